import sys

from .command import main


try:
    main()
except KeyboardInterrupt:
    sys.exit(130)
