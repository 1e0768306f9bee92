"""LeNet with sigmoids trained without BatchNorm, with torch's and with fastbn's; `fastbn demo` runs it."""
