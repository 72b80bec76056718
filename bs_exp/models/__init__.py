"""Models: their sources, their compressible matrices, and how factors replace these and are saved."""
