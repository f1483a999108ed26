"""From the format that a model has to the one that a target takes: the graph of formats, roads through it, environments of converters."""
