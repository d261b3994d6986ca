"""The routes by which a person steers: cancel and retry a job, train, roll back, pin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, HTTPException, Path
from pydantic import BaseModel, Field

from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.version import RegistryError, Version


class Queue(Protocol):
    """The trainings, as far as they are steered."""

    def enqueue(self, project: str, trigger: str) -> int: ...
    def cancel(self, job_id: int) -> bool: ...
    def retry(self, job_id: int) -> int | None: ...
    def status(self, job_id: int | str) -> Mapping[str, Any] | None: ...


JobId = Annotated[int, Path(ge=1, lt=10**15)]
Key = Annotated[str, Path(pattern=r"^[0-9]{1,15}-[0-9a-f]{6}$")]


class ChosenVersion(BaseModel):
    """The number of a version."""

    version: int = Field(ge=0, lt=10**9)


class PinnedVersion(BaseModel):
    """The number of a version, or null to let new versions serve again."""

    version: int | None = Field(ge=0, lt=10**9)


def control_router(
    registry: Registry, jobs: Queue | None, changed: Callable[[str], None] = lambda key: None
) -> APIRouter:
    """The routes; `jobs` is None where the backend cannot train, `changed` is told the key of a project to look at."""
    router = APIRouter(prefix="/api", tags=["control"])

    def queue() -> Queue:
        if jobs is None:
            raise HTTPException(
                409,
                "this backend cannot train: set YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN and start it "
                "again",
            )
        return jobs

    def project(key: str) -> ProjectRegistry:
        try:
            return registry.project(key)
        except RegistryError as error:
            raise HTTPException(404, str(error)) from None

    def chosen(key: str, choose: Callable[[], Version]) -> dict[str, Any]:
        try:
            version = choose()
        except RegistryError as error:
            raise HTTPException(409, str(error)) from None
        changed(key)
        return {"model_version": version.name, "pinned": project(key).pinned()}

    def job_state(job_id: int) -> Mapping[str, Any]:
        status = queue().status(job_id)
        if status is None:
            raise HTTPException(404, f"there is no job {job_id} here")
        return status

    @router.post("/jobs/{job_id}/cancel")
    def cancel(job_id: JobId) -> dict[str, Any]:
        state = job_state(job_id)["state"]
        if not queue().cancel(job_id):
            raise HTTPException(409, f"job {job_id} has ended: {state}")
        return {"job": job_id, **job_state(job_id)}

    @router.post("/jobs/{job_id}/retry")
    def retry(job_id: JobId) -> dict[str, Any]:
        state = job_state(job_id)["state"]
        again = queue().retry(job_id)
        if again is None:
            raise HTTPException(409, f"job {job_id} is {state}; only a failed or cancelled one can be retried")
        return {"job": again, **job_state(again)}

    @router.post("/projects/{key}/train")
    def train(key: Key) -> dict[str, Any]:
        job = queue().enqueue(project(key).key, "asked for by hand")
        return {"job": job, **job_state(job)}

    @router.post("/projects/{key}/rollback")
    def rollback(key: Key, body: ChosenVersion) -> dict[str, Any]:
        return chosen(key, lambda: project(key).rollback(body.version))

    @router.post("/projects/{key}/pin")
    def pin(key: Key, body: PinnedVersion) -> dict[str, Any]:
        number = body.version
        return chosen(key, lambda: project(key).unpin() if number is None else project(key).pin(number))

    return router
