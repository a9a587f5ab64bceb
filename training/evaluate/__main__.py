import sys

from ..commands import run_command, show_messages
from .command import main


show_messages()
sys.exit(run_command(main, "Not measured"))
