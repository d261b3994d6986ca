"""The server."""

from __future__ import annotations

from typing import Any

from flask import Flask, jsonify, request

from .model import LabelStudioMLBase

TRAIN_EVENTS = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "START_TRAINING")


def init_app(model_class: type[LabelStudioMLBase]) -> Flask:
    server = Flask(__name__)

    @server.post("/predict")
    def predict() -> Any:
        data = request.json
        project, params = data["project"].split(".")[0], data.get("params", {})
        context = params.pop("context", {})
        model: Any = model_class(project_id=project, label_config=data.get("label_config"))
        response = model.predict(data["tasks"], context=context, **params)
        response.set_version(model.get("model_version"))
        return jsonify({"results": response.model_dump()["predictions"]})

    @server.post("/setup")
    def setup() -> Any:
        data = request.json
        model = model_class(project_id=data["project"].split(".")[0], label_config=data.get("schema"))
        return jsonify({"model_version": model.get("model_version")})

    @server.post("/webhook")
    def webhook() -> Any:
        data = request.json
        event = data.pop("action")
        if event not in TRAIN_EVENTS:
            return jsonify({"status": "Unknown event"})
        project = data["project"]
        model = model_class(str(project["id"]), label_config=project["label_config"])
        return jsonify({"result": model.fit(event, data), "status": "ok"}), 201

    @server.get("/health")
    def health() -> Any:
        return jsonify({"status": "UP", "model_class": model_class.__name__})

    return server
