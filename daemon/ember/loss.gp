# Draws docs/ember-loss.svg from docs/ember-loss.csv. Run at the top of the repository.
set terminal svg size 640,360 font "sans-serif,12"
set output "docs/ember-loss.svg"
set datafile separator ","
set logscale y
set yrange [0.15:8]
set ytics (0.2, 0.3, 0.5, 1, 2, 4, 8)
set grid ytics lc rgb "#dddddd"
set xlabel "million tokens"
set ylabel "loss (nats a token)"
set key top right
plot "docs/ember-loss.csv" every ::1 using ($2/1e6):3 with lines lw 1.5 lc rgb "#c05020" title "training", \
     "" every ::1 using ($4 > 0 ? $2/1e6 : 1/0):4 with linespoints pt 7 ps 0.4 lc rgb "#204080" title "held out"
