"""Whether attribution scores can be believed: held against retraining, beside nulls, with intervals and costs."""
