"""`anima-fast doctor`: from a workflow, a server or a pipeline to what is wrong with it, by evidence."""
