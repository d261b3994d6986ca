"""YOLO-NAS as a Label Studio machine learning backend: pre-annotates tasks and learns from the corrections."""
