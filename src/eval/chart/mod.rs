//! Line, dot and bar charts as SVG: what the evaluations draw. No fonts, no files, one standard-conforming text that
//! browsers and papers take.

mod scale;

use std::fmt::Write as _;

pub use scale::Scale;

/// Colours that people with colour-blindness tell apart (Okabe and Ito), of which the series take one after another.
pub const COLOURS: [&str; 7] = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D"];
/// What stands behind the data: diagonals, means.
pub const FAINT: &str = "#8A8F98";

const INK: &str = "#24292F";
const GRID: &str = "#E4E7EB";
/// Size of the area that data are drawn in.
const PLOT: (f64, f64) = (360.0, 260.0);
/// Least space on the left, for numbers; to the right, above with the title, and below.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 22.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Height of a line of the legend.
const LINE: f64 = 18.0;
/// Width of a letter of 12 pixels, about.
const LETTER: f64 = 6.6;

/// Panels side by side.
#[derive(Clone, Debug, Default)]
pub struct Figure {
    /// From the left.
    pub panels: Vec<Panel>,
}

/// Two axes and what is drawn between them.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// In this order, later ones over earlier ones.
    pub marks: Vec<Mark>,
    /// Names of colours, below.
    pub legend: Vec<(String, &'static str)>,
}

/// An axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows, with the unit.
    pub label: String,
    /// From values to places.
    pub scale: Scale,
}

/// Something drawn at (x, y) in the axes' units.
#[derive(Clone, Debug)]
pub enum Mark {
    /// A line through points.
    Line {
        /// From the left.
        points: Vec<(f64, f64)>,
        /// Of the stroke.
        colour: &'static str,
        /// Whether it is dashed.
        dashed: bool,
    },
    /// A dot a point.
    Dots {
        /// In any order.
        points: Vec<(f64, f64)>,
        /// Of the dots.
        colour: &'static str,
    },
    /// A filled rectangle.
    Bar {
        /// A corner.
        from: (f64, f64),
        /// The opposite one.
        to: (f64, f64),
        /// Of the filling.
        colour: &'static str,
        /// From 0, nothing, to 1.
        opacity: f64,
    },
    /// Small text above a point.
    Note {
        /// The point.
        at: (f64, f64),
        /// The text.
        text: String,
    },
}

impl Axis {
    /// With this label and scale.
    pub fn new(label: &str, scale: Scale) -> Self {
        Self { label: label.into(), scale }
    }
}

impl Panel {
    /// Without marks.
    pub fn new(title: &str, x: Axis, y: Axis) -> Self {
        Self { title: title.into(), x, y, marks: Vec::new(), legend: Vec::new() }
    }

    /// A line with dots, named in the legend.
    pub fn series(&mut self, name: &str, points: Vec<(f64, f64)>, colour: &'static str) {
        self.marks.push(Mark::Line { points: points.clone(), colour, dashed: false });
        self.marks.push(Mark::Dots { points, colour });
        self.legend.push((name.into(), colour));
    }

    /// Space on the left: names may be long.
    fn left(&self) -> f64 {
        let longest = self.y.scale.ticks().iter().map(|(_, text)| text.chars().count()).max().unwrap_or(0);
        LEFT.max(longest as f64 * LETTER + 30.0)
    }

    /// Space below: names that do not fit side by side are turned.
    fn bottom(&self) -> f64 {
        if self.turned() { BOTTOM + self.longest_below() * 0.75 } else { BOTTOM }
    }

    fn longest_below(&self) -> f64 {
        self.x.scale.ticks().iter().map(|(_, text)| text.chars().count() as f64 * LETTER).fold(0.0, f64::max)
    }

    fn turned(&self) -> bool {
        let count = self.x.scale.ticks().len().max(1) as f64;
        self.longest_below() + 6.0 > PLOT.0 / count
    }

    fn size(&self) -> (f64, f64) {
        let height = TOP + self.height() + self.bottom() + LINE * self.legend.len() as f64;
        let named = self.legend.iter().map(|(name, _)| 20.0 + LETTER * name.chars().count() as f64);
        (self.left() + named.fold(PLOT.0, f64::max) + RIGHT, height)
    }

    /// Of the data area: rows of names want room each.
    fn height(&self) -> f64 {
        match &self.y.scale {
            Scale::Names(names) => PLOT.1.max(20.0 * names.len() as f64),
            _ => PLOT.1,
        }
    }
}

impl Figure {
    /// The whole picture.
    pub fn to_svg(&self) -> String {
        let sizes: Vec<(f64, f64)> = self.panels.iter().map(Panel::size).collect();
        let width: f64 = sizes.iter().map(|size| size.0).sum();
        let height = sizes.iter().map(|size| size.1).fold(0.0, f64::max) + 6.0;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} \
             {height:.0}\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"{INK}\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let mut x = 0.0;
        for (panel, size) in self.panels.iter().zip(sizes) {
            let _ = writeln!(out, "<g transform=\"translate({:.1} {TOP})\">", x + panel.left());
            panel.draw(&mut out);
            out += "</g>\n";
            x += size.0;
        }
        out + "</svg>\n"
    }
}

impl Panel {
    /// Draws with the upper left corner of the data area at 0, 0.
    fn draw(&self, out: &mut String) {
        let (width, height) = (PLOT.0, self.height());
        text(out, (0.0, -16.0), "start", "font-size=\"14\" font-weight=\"bold\"", &self.title);
        for (at, label) in self.y.scale.ticks() {
            let y = height * (1.0 - at);
            line(out, (0.0, y), (width, y), GRID);
            text(out, (-8.0, y + 4.0), "end", "", &label);
        }
        for (at, label) in self.x.scale.ticks() {
            let x = width * at;
            line(out, (x, 0.0), (x, height), GRID);
            if self.turned() {
                let turn = format!("transform=\"rotate(-45 {x:.1} {:.1})\"", height + 14.0);
                text(out, (x + 4.0, height + 14.0), "end", &turn, &label);
            } else {
                text(out, (x, height + 18.0), "middle", "", &label);
            }
        }
        for mark in &self.marks {
            self.mark(out, mark);
        }
        let _ = writeln!(
            out,
            "<path d=\"M0 0V{height:.1}H{width:.1}\" fill=\"none\" stroke=\"{INK}\" stroke-width=\"1\"/>"
        );
        let below = height + self.bottom() - 12.0;
        text(out, (width / 2.0, below), "middle", "", &self.x.label);
        let aside = 14.0 - self.left();
        let turn = format!("transform=\"rotate(-90 {aside:.1} {:.1})\"", height / 2.0);
        text(out, (aside, height / 2.0), "middle", &turn, &self.y.label);
        for (row, (name, colour)) in self.legend.iter().enumerate() {
            let y = below + LINE * (row + 1) as f64 + 2.0;
            let _ = writeln!(
                out,
                "<rect x=\"0\" y=\"{:.1}\" width=\"14\" height=\"10\" rx=\"2\" fill=\"{colour}\"/>",
                y - 9.0
            );
            text(out, (20.0, y), "start", "", name);
        }
    }

    fn mark(&self, out: &mut String, mark: &Mark) {
        let place = |(x, y): (f64, f64)| {
            (PLOT.0 * self.x.scale.place(x), self.height() * (1.0 - self.y.scale.place(y)))
        };
        match mark {
            Mark::Line { points, colour, dashed } => {
                let mut path = String::new();
                for (x, y) in points.iter().copied().map(place) {
                    let _ = write!(path, "{x:.1},{y:.1} ");
                }
                let dashes = if *dashed { " stroke-dasharray=\"5 4\"" } else { "" };
                let _ = writeln!(
                    out,
                    "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\"{dashes}/>",
                    path.trim_end()
                );
            }
            Mark::Dots { points, colour } => {
                for (x, y) in points.iter().copied().map(place) {
                    let _ =
                        writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.4\" fill=\"{colour}\"/>");
                }
            }
            Mark::Bar { from, to, colour, opacity } => {
                let ((x0, y0), (x1, y1)) = (place(*from), place(*to));
                let _ = writeln!(
                    out,
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\" \
                     fill-opacity=\"{opacity}\"/>",
                    x0.min(x1),
                    y0.min(y1),
                    (x1 - x0).abs(),
                    (y1 - y0).abs()
                );
            }
            Mark::Note { at, text: words } => {
                let (x, y) = place(*at);
                // Kept within the data area at its sides.
                let anchor = if x > PLOT.0 - 40.0 {
                    "end"
                } else if x < 40.0 {
                    "start"
                } else {
                    "middle"
                };
                let halo = "font-size=\"11\" stroke=\"white\" stroke-width=\"3\" stroke-opacity=\"0.75\" paint-order=\"stroke\"";
                text(out, (x, y - 8.0), anchor, halo, words);
            }
        }
    }
}

fn line(out: &mut String, (x0, y0): (f64, f64), (x1, y1): (f64, f64), colour: &str) {
    let _ = writeln!(
        out,
        "<line x1=\"{x0:.1}\" y1=\"{y0:.1}\" x2=\"{x1:.1}\" y2=\"{y1:.1}\" stroke=\"{colour}\"/>"
    );
}

/// Text as it stands in XML and HTML, within quotes too.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, more: &str, words: &str) {
    let words = escape(words);
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{words}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_land_where_the_axes_say() {
        let axis = |label: &str| Axis::new(label, Scale::linear(0.0, 10.0));
        let mut panel = Panel::new("a < b & c", axis("x"), axis("y"));
        panel
            .marks
            .push(Mark::Dots { points: vec![(0.0, 0.0), (10.0, 10.0), (5.0, 2.5)], colour: COLOURS[0] });
        panel.marks.push(Mark::Bar { from: (2.0, 0.0), to: (4.0, 5.0), colour: FAINT, opacity: 0.5 });
        let svg = Figure { panels: vec![panel.clone(), panel] }.to_svg();
        for (x, y) in [(0.0, 260.0), (360.0, 0.0), (180.0, 195.0)] {
            assert_eq!(svg.matches(&format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\"")).count(), 2, "{svg}");
        }
        assert!(svg.contains("<rect x=\"72.0\" y=\"130.0\" width=\"72.0\" height=\"130.0\""), "{svg}");
        assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("a < b"), "escaped");
        for tag in ["svg", "g", "text"] {
            let opened = svg.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, svg.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn long_names_are_turned() {
        let names = |n: usize| Scale::Names((0..n).map(|i| format!("a rather long name {i}")).collect());
        let panel = |n| Panel::new("", Axis::new("", names(n)), Axis::new("", Scale::linear(0.0, 1.0)));
        assert!(panel(12).turned() && !panel(2).turned());
        assert!(panel(12).size().1 > panel(2).size().1);
    }
}
