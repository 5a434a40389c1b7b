"""From a byte range of a file to bytes: plan purely, then fetch and decode with trio."""
