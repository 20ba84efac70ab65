# page
ktmoe info
# end
