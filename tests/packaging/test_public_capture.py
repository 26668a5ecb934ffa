"""`corrdit.capture` is the function, also where its module was imported first."""

import subprocess
import sys


def test_capture_is_the_function_after_its_module_was_imported():
    program = (
        "import corrdit.integrations.diffusers.captures\n"
        "from corrdit import capture\n"
        "from corrdit.integrations.diffusers import capture as of_the_package\n"
        "assert callable(capture) and of_the_package is capture, capture\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/", timeout=120)
