import sys

from ..commands import run_command
from .command import main


sys.exit(run_command(main, "Not measured"))
