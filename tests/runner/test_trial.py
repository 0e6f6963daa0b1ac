"""One run, as every executor makes it: what it logs and what it tells."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from precision_lab.runner.trial import _logging_to


def test_runs_at_once_keep_the_messages_of_their_own_threads_and_those_of_nobody(tmp_path):
    barrier, log = threading.Barrier(3), logging.getLogger("some.library")

    def go(number):
        with _logging_to(tmp_path / "logs" / f"{number}.log"):
            barrier.wait()
            log.warning("of run %d", number)
            barrier.wait()
            barrier.wait()

    with ThreadPoolExecutor(2) as threads:
        ended = threads.map(go, range(2))
        for _ in range(2):
            barrier.wait()
        log.warning("of no run")
        barrier.wait()
        list(ended)

    for number in range(2):
        lines = (tmp_path / "logs" / f"{number}.log").read_text().splitlines()
        assert [line.partition("some.library: ")[2] for line in lines] == [f"of run {number}", "of no run"]
