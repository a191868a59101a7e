"""The inner problem: loss plus regulariser as a function of phi, linearized at a point."""
