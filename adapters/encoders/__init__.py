"""Plain vision encoders, of timm, OpenCLIP and transformers, behind one interface."""
