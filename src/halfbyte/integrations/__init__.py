"""Where halfbyte meets other libraries: the bitsandbytes names, transformers, peft, accelerate."""
