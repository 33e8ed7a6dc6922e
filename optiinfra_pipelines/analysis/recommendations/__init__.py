"""What to change: rules as data, what they measure, how far a knob is turned, and which proposal is first."""
