"""``python -m worker.inference``: serve one base model and its adapters until SIGTERM."""

import sys

import structlog

from models.errors import TuneryError
from models.logs import configure_logging
from models.settings import load_settings
from worker.inference.process import InferenceProcess


def main() -> int:
    settings = load_settings()
    configure_logging(settings.log_level, "inference")
    try:
        return InferenceProcess(settings).run()
    except TuneryError as error:
        structlog.get_logger(__name__).error("inference_start_failed", **error.to_dict())
        return 2


if __name__ == "__main__":
    sys.exit(main())
