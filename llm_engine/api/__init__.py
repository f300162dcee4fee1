"""HTTP: each folder is one dialect; a dialect translates and decides nothing."""
