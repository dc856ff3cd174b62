"""torchrun with an exit status that says what happened: `python -m cmacc.flows.agent` takes torchrun's own arguments.

It starts the ranks of one machine, which is all there are or one of many. torchrun itself ends with status 1 whatever became of
its ranks. Here:

    0    the run is complete
    143  the ranks saved and left because of a signal: start it again, it goes on
    75   other machines did not come, or went while this one waited for them: start it again
    2    the command line is wrong
    1    a rank failed, or refused an option with a sentence
"""

from __future__ import annotations

import os
import signal
import sys

STOPPED = 143
"""Exit status of who saved and left because of a signal."""
ATTENDED = "CMACC_AGENT"
"""Set for ranks whose log goes to a flow: the agent's process id."""
FOR_FLOW = "CMACC_FLOW"
"""Set by the flow that starts this process: its process id, with which the agent is to die."""
AGAIN = 75
"""Exit status of who met nobody; EX_TEMPFAIL of sysexits.h."""
_USAGE = 2
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main() -> None:
    """Until all ranks are done; ends with one of the statuses above."""
    flow = os.environ.pop(FOR_FLOW, None)
    if flow is not None:
        from cmacc.ingest.child import die_with

        die_with(int(flow))
        os.environ[ATTENDED] = str(os.getpid())
    sys.exit(_run(sys.argv[1:]))


def _run(given: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import determine_local_world_size, parse_args, run

    try:
        arguments = parse_args(["--signals-to-handle", _SIGNALS, *given])
        # By itself torchrun gives each of several ranks one thread; on a CPU they share the cores.
        ranks = determine_local_world_size(arguments.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
        if ":" in arguments.nnodes:
            # torch 2.11 tells the address of rank 0 but once, and a machine that comes later would wait for it for ever.
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        run(arguments)
    except SignalException:
        return STOPPED
    except RendezvousError as error:
        print(f"cmacc: the machines of the run did not meet ({error})", file=sys.stderr)
        return AGAIN
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if _USAGE in codes:
            return _USAGE
        return STOPPED if STOPPED in codes and codes <= {STOPPED, -signal.SIGTERM} else 1
    return 0


if __name__ == "__main__":
    main()
