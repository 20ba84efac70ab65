# page
ktmoe eval --methods BF16,AMXINT4 --bytes 1024
# end
