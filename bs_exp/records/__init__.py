"""What lies on disk of a run or a sweep: one reader and one writer for each file."""
