# page
ktmoe verify --digest
ktmoe verify $model --digest --layer 3 --method AMXINT4
# end
