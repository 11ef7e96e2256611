"""``POST /v1/fine_tuning/estimate``: what a job would take, without submitting it."""

from dataclasses import dataclass

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from api import actions
from api.deps import Caller, CallerDep, ServicesDep
from api.openai import translate
from api.openai.schemas import JobCreate
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject
from models.domain.estimates import BaseShape, Corrections, Probe, RowLengths, estimate
from models.domain.generation import PreviewRequest
from models.domain.reports import DatasetReport
from models.domain.training import TrainingSpec
from models.errors import InvalidRequestError, UnavailableError, UnprocessableError
from models.registry import base_models, files, inference_servers, probes
from worker.training import methods, objectives

router = APIRouter(prefix="/fine_tuning", tags=["fine-tuning"], route_class=StrictJsonRoute)

N_COUNTED = 2000
"""Rows whose tokens are counted; the others are taken to be like them."""


@router.post("/estimate")
async def estimate_job(body: JobCreate, services: ServicesDep, caller: CallerDep) -> JsonObject:
    """Memory by part, time, tokens and disk that a job with this body would take.

    It rests on measurements of the base model on a worker. The first request for a base model and
    precision asks for them and is answered 503, code ``not_measured_yet``, with Retry-After.
    """
    spec = await run_in_threadpool(_spec, services, caller, body)
    known = await run_in_threadpool(_look_up, services, caller, spec)
    counted = await services.inference.preview(
        known.server_url,
        PreviewRequest(
            rows_key=known.rows_key, n_rows=0, n_counted=N_COUNTED, max_length=spec.max_seq_length
        ),
    )
    rows = _row_lengths(spec, known, counted["statistics"])
    shape = known.shape
    objective = objectives.get_objective(spec.objective["type"])
    method = methods.get_method(spec.peft["type"])
    scale = objective.rate_scale * method.rate_scale
    spec = spec.resolved(rows.n_rows, shape.n_linear + shape.n_other, scale)
    n_adapter = method.count_parameters(shape, methods.parse_params(spec.peft))
    found = estimate(spec, shape, n_adapter, rows, known.probe, known.corrections)
    return {"object": "fine_tuning.estimate", "model": spec.model} | found.model_dump()


def _spec(services: Services, caller: Caller, body: JobCreate) -> TrainingSpec:
    with services.database.read() as session:
        return translate.training_spec(body, actions.find_start(session, caller, body.model))


@dataclass(frozen=True, slots=True)
class _Known:
    """What the database knows about such a job."""

    server_url: str
    rows_key: str
    n_rows: int
    n_held_out: int
    shape: BaseShape
    probe: Probe
    corrections: Corrections


def _look_up(services: Services, caller: Caller, spec: TrainingSpec) -> _Known:
    """Find everything that an estimate rests on.

    Raises:
        InvalidRequestError, NotFoundError: as for the job itself, or the file is not checked yet.
        UnavailableError: the base model is not measured yet, or has no inference server.
        UnprocessableError: it cannot be measured (``not_measurable``).
    """
    precision = spec.precision.type
    with services.database.write() as session:
        actions.check_job(session, services, caller, spec)
        probes.want(session, spec.model, precision)
        services.bell.ring_after_commit(session)
    with services.database.read() as session:
        file = files.get(session, caller.project_id, spec.training_file, param="training_file")
        if file.report is None:
            raise InvalidRequestError(
                f"File {file.id} has not been checked yet; ask again in a moment.",
                param="training_file",
                code="file_not_linted",
            )
        if file.rows_key is None:
            raise InvalidRequestError(
                f"File {file.id} has no usable row; see its report.",
                param="training_file",
                code="no_usable_row",
            )
        base, row = base_models.get(session, spec.model), probes.get(session, spec.model, precision)
        if row is not None and row.failure is not None:
            raise UnprocessableError(
                f"Base model {spec.model!r} cannot be measured in {precision}: {row.failure}",
                param="model",
                code="not_measurable",
            )
        if row is None or row.values is None or base.shape is None:
            raise UnavailableError(
                f"Base model {spec.model!r} has not been measured in {precision} yet; a worker "
                "does so as soon as it has no job. Ask again in half a minute.",
                param="model",
                code="not_measured_yet",
                retry_after=10,
            )
        probe = Probe.model_validate(row.values)
        n_rows = DatasetReport.model_validate(file.report).n_valid_rows
        n_held_out = round(n_rows * spec.validation_split)
        if spec.validation_file is not None:
            held_out = files.get(
                session, caller.project_id, spec.validation_file, param="validation_file"
            )
            n_held_out = (held_out.report or {}).get("n_valid_rows", 0)
        return _Known(
            server_url=inference_servers.for_base(session, spec.model).url,
            rows_key=file.rows_key,
            n_rows=n_rows - round(n_rows * spec.validation_split),
            n_held_out=n_held_out,
            shape=BaseShape.model_validate(base.shape),
            probe=probe,
            corrections=probes.corrections(session, spec.model, precision, probe.device),
        )


def _row_lengths(spec: TrainingSpec, known: _Known, statistics: JsonObject) -> RowLengths:
    longest = spec.max_seq_length
    sample = [min(length, longest) for length in statistics["lengths"]] or [1]
    n_tokens = max(1, statistics["n_tokens"])
    return RowLengths(
        n_rows=max(1, known.n_rows),
        n_held_out=known.n_held_out,
        sample=sample,
        trained_share=min(1.0, statistics["n_trained"] / n_tokens),
    )
