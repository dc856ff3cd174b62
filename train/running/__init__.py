"""What a long run needs beside its steps: ranks, checkpoints, signals, numbers, alarms."""
