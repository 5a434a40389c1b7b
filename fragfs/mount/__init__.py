"""The FUSE mount: the only importer of pyfuse3."""
