"""Pure tensor maths: no state, no model library.  Every kernel stands beside a naive reference that the tests compare it to."""
