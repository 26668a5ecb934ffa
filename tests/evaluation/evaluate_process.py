"""Runs `corrdit` with its arguments; a process is killed when it comes to the video KILLED_AT of its environment."""

import os
import signal

from corrdit.cli import entry_point
from corrdit.integrations.lightning import EvaluationModule


def main() -> None:
    evaluated = EvaluationModule._evaluated

    def killed_at_last(self, choice, batch):
        if batch["name"] == os.environ["KILLED_AT"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluated(self, choice, batch)

    EvaluationModule._evaluated = killed_at_last
    entry_point()


if __name__ == "__main__":
    main()
