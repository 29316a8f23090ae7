"""Pages that show the results of a run, or of several runs compared."""
