"""The soak: everything that fragfs does, at once, on one library, while processes are killed."""
