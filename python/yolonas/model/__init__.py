"""YOLO-NAS as plain `nn.Module`s."""

from yolonas.model.config import VARIANTS, Preprocessing, Variant
from yolonas.model.head import RawOutput
from yolonas.model.info import ModelInfo
from yolonas.model.yolo_nas import YoloNAS

__all__ = ["VARIANTS", "ModelInfo", "Preprocessing", "RawOutput", "Variant", "YoloNAS"]
