"""What the process imports first from which workers are forked.

Ctrl-C reaches the whole group. It ends that process, while libraries are imported, in silence.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
