"""Where the numbers of a measurement go: loggers, the history file, the console, pictures and listeners."""
