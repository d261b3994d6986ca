"""The OpenAPI document: Label Studio's protocol, as this backend understands it, beside the routes that FastAPI knows.

The routes of the protocol take raw bodies, which are parsed on worker threads and looked at by hand: what Label Studio
sends is large, and its unknown fields are nobody's business. So their bodies and answers are described here. Other
routes need nothing of this: FastAPI describes them by their annotations. A test sends both kinds what fits the document
and what does not.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from labelstudio_backend.settings import Settings

Schema = dict[str, Any]

_PROBLEM: Schema = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "One sentence: what is wrong, and what to do."}},
    "required": ["error"],
}
_UID: Schema = {
    "type": "string",
    "pattern": r"^[0-9]{1,15}\.[0-9]{1,15}$",
    "description": "ID of the project and time of its creation.",
    "example": "5.1795289898",
}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_VERSION: Schema = {
    "type": "string",
    "description": "Name of the version that made it.",
    "example": "yolonas-5-1a2b3c-v3",
}
_OBJECT: Schema = {"type": "object"}

_SETUP: Schema = {
    "type": "object",
    "properties": {
        "project": _UID,
        "schema": {**_TEXT_OR_NULL, "description": "The label config, XML."},
        "hostname": {**_TEXT_OR_NULL, "description": "The address under which Label Studio knows itself."},
        "access_token": {"description": "Not used: YOLONAS_LABEL_STUDIO_TOKEN is."},
    },
    "required": ["project"],
}
_PREDICT: Schema = {
    "type": "object",
    "properties": {
        "tasks": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"description": "A number, where Label Studio has stored the task."},
                    "data": {"description": 'As the label config names them: {"image": "s3://..."}.'},
                },
            },
        },
        "project": _UID,
        "label_config": _TEXT_OR_NULL,
        "params": {"description": "An object whose context is not null asks while somebody draws."},
    },
    "required": ["tasks", "project"],
}
_PREDICTION: Schema = {
    "type": "object",
    "properties": {
        "model_version": _VERSION,
        "score": {"type": "number", "description": "Low: label this one first."},
        "result": {"type": "array", "items": _OBJECT, "description": "Regions, in Label Studio's format."},
    },
    "required": ["model_version", "score", "result"],
}
_RESULTS: Schema = {
    "type": "array",
    "description": "One for each task, in order; an empty list for one to be asked again later.",
    "items": {"anyOf": [_PREDICTION, {"type": "array", "maxItems": 0}]},
}
_EVENT: Schema = {
    "type": "object",
    "properties": {
        "action": {"type": "string", "example": "ANNOTATION_CREATED"},
        "project": {"description": "The whole project; one that cannot be made out is no reason to refuse an event."},
    },
    "required": ["action"],
}
_JOB: Schema = {"type": ["string", "integer"], "description": "As /webhook gave it."}


def _body(schema: Schema) -> Schema:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _object(**properties: Schema) -> dict[int | str, Schema]:
    """The answer 200."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {200: {"description": "Done.", "content": {"application/json": {"schema": schema}}}}


ROUTES: dict[str, dict[str, Any]] = {
    "/setup": {
        "summary": "Introduce a project; called before every batch of predictions.",
        "openapi_extra": _body(_SETUP),
        "responses": _object(model_version=_VERSION),
    },
    "/predict": {
        "summary": "Predict boxes for tasks.",
        "openapi_extra": _body(_PREDICT),
        "responses": _object(results=_RESULTS),
    },
    "/versions": {
        "summary": "All versions of all projects.",
        "responses": _object(versions={"type": "array", "items": _VERSION}),
    },
    "/webhook": {
        "summary": "An event of Label Studio's; START_TRAINING queues a training, whose job it answers.",
        "openapi_extra": _body(_EVENT),
        "responses": {
            200: {
                "description": "Taken.",
                "content": {"application/json": {"schema": {"type": "object", "properties": {"job": _JOB}}}},
            }
        },
    },
    "/job_status": {
        "summary": "How a training goes.",
        "openapi_extra": _body({"type": "object", "properties": {"job": _JOB}, "required": ["job"]}),
        "responses": _object(job_status={"type": "string"}),
    },
}
"""Arguments of the routes' decorators."""

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _PROBLEM}}}
    for status, description in (
        ("4XX", "Refused, with a sentence."),
        (503, "The state of this backend cannot be read or written."),
    )
}
"""What every route may answer; the first keeps FastAPI from naming its own 422, which is a 400 here."""


def describe(app: FastAPI, settings: Settings) -> None:
    """Have the document say how callers show who they are, where they must."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        described = plain()
        if settings.protected:
            schemes = described.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes |= {"basic": {"type": "http", "scheme": "basic"}, "secret": {"type": "http", "scheme": "bearer"}}
            described["security"] = [{"basic": []}, {"secret": []}]
            described["paths"]["/health"]["get"]["security"] = []
        return described

    app.openapi = document  # type: ignore[method-assign]
