"""``python -m worker.inference``: serve one base model and its adapters until SIGTERM."""

import sys

import structlog

from models.errors import TuneryError
from models.logs import configure_logging
from models.settings import load_settings

logger = structlog.get_logger(__name__)


def main() -> int:
    """Return the exit status: 0 after an orderly stop, 2 where what is set does not do."""
    settings = load_settings()
    configure_logging(settings.log_level, "inference")
    if not settings.inference.token.get_secret_value():
        logger.error(
            "inference_token_missing",
            remedy="Set TUNERY_INFERENCE__TOKEN to the same secret as for the API.",
        )
        return 2
    from worker.inference.process import InferenceProcess  # seconds, which a mistake need not wait

    try:
        return InferenceProcess(settings).run()
    except TuneryError as error:
        logger.error("inference_start_failed", **error.to_dict())
        return 2


if __name__ == "__main__":
    sys.exit(main())
