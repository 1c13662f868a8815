"""The tests of halfbyte: the folders mirror the package."""
