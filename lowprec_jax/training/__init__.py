"""The training program: an application of the library that the library does not depend on."""
