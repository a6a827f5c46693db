"""Two processes of a script under torchrun, for tests of what the script does."""

import subprocess
import sys


def run_two_processes(script: str, *arguments, env: dict[str, str] | None = None, attempts: int = 3) -> str:
    """Standard output. Scripts can be started again: they go on where they were, or write the same files again.

    On a loaded machine torch's threads (2.13, gloo) now and then abort a process at its end, or leave two waiting for
    each other; neither is what these tests are about, and what a run left behind is checked in any case.
    """
    prefix = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command, said = [sys.executable, *prefix, script, *map(str, arguments)], []
    for _ in range(attempts):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=env, **pipes) as launcher:
            try:
                output, errors = launcher.communicate(timeout=100)
            except subprocess.TimeoutExpired:
                launcher.terminate()  # it ends its processes before itself
                output, errors = launcher.communicate()
                errors += "\nended after 100 seconds"
        if launcher.returncode == 0:
            return output
        said.append(errors)
    raise AssertionError("\n\nnext attempt\n".join(said))
