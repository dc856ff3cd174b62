"""`python -m cmacc …` is the command `cmacc …`; `torchrun … -m cmacc pretrain …` runs it as one of several ranks."""

from cmacc.flows.cli import main

if __name__ == "__main__":
    main()
