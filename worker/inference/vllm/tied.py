"""``python -m worker.inference.vllm.tied COMMAND …``: becomes COMMAND, which ends with its parent.

A vLLM left behind by a killed server would keep the whole memory of a GPU.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(command: list[str], parent: int) -> None:
    """Replace this process by `command`; the kernel sends it SIGTERM when `parent` ends.

    To be exact, when the thread of the parent ends that started this process.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        raise SystemExit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[2:], int(sys.argv[1]))
