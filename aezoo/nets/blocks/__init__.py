"""Parts of networks that several builders or models share, one file each."""
