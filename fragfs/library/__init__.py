"""What is on disk: catalog, packs, adding, removing, verifying. FORMAT.md is the contract."""
