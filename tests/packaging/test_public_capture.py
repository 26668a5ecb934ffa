"""`corrdit.capture` is the function, also where its module was imported first."""

import subprocess
import sys


def test_capture_is_the_function_after_its_module_was_imported():
    program = (
        "import corrdit.integrations.diffusers.capture\n"
        "from corrdit import capture\n"
        "assert callable(capture), capture\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/", timeout=120)
