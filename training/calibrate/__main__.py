from ..runner import show_messages
from .command import main


show_messages()
main()
