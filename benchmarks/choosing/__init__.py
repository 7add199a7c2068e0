"""Every model, and attention, LSTM and GRU beside them, on the same three small tasks."""
