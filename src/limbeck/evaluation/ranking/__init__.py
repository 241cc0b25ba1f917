"""Which layers of a hybrid stay softmax: scores of single layers and of sets, and the maths of comparing them."""
