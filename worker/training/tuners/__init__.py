"""What methods put on a model: the shared way through PEFT, and tuners that PEFT has not."""
