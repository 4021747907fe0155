//! In which order a device would do what the log of the fake driver says, and what the host waits for.

use std::collections::HashMap;

/// What has happened at a point of a stream: the last graph that has ended, counted from 1 (0: none, or what was
/// launched before the first), and the last copy to the device.
#[derive(Clone, Copy, Default)]
struct Point {
    ended: usize,
    copied: usize,
}

impl Point {
    fn after(self, other: Self) -> Self {
        Self { ended: self.ended.max(other.ended), copied: self.copied.max(other.copied) }
    }
}

/// A steady state: graphs on one stream, the copies for the next on another.
#[derive(Default)]
struct Timeline<'a> {
    streams: HashMap<&'a str, Point>,
    events: HashMap<&'a str, Point>,
    now: Point,
    /// The newest graph that the host has waited for.
    waited: usize,
    /// The stream of the graphs.
    kernels: Option<&'a str>,
}

/// Checks that from the first graph of `log` to the last, while one runs the batch of the next is copied, on another
/// stream, and the next is queued before the host waits for the one; and that nothing else is launched.
///
/// Returns the number of graphs launched.
#[track_caller]
pub fn overlaps(log: &[String]) -> usize {
    let graphs = || log.iter().enumerate().filter(|(_, line)| line.starts_with("graph of")).map(|(i, _)| i);
    let (Some(first), Some(last)) = (graphs().next(), graphs().next_back()) else { return 0 };
    let mut timeline = Timeline::default();
    let mut capturing = false;
    for (i, line) in log[..=last].iter().enumerate() {
        match line.split(' ').next() {
            Some("capture,") => capturing = true,
            Some("captured") => capturing = false,
            _ => {}
        }
        assert!(i < first || capturing || !line.starts_with("launch"), "launched beside the graphs: {line}");
        timeline.take(line, i >= first);
    }
    timeline.now.ended
}

impl<'a> Timeline<'a> {
    /// The next call; `steady` after the first graph.
    #[track_caller]
    fn take(&mut self, line: &'a str, steady: bool) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["copy", "in", "of", _, "on", stream] => {
                self.now.copied += 1;
                let point = self.streams.entry(stream).or_default();
                if steady {
                    // Its place is that of the graph before the newest.
                    assert_eq!(point.ended + 1, self.now.ended, "what a copy waits for");
                    assert_ne!(self.kernels, Some(stream), "copies have a stream of their own");
                }
                point.copied = self.now.copied;
            }
            ["graph", "of", _, "launches", "on", stream] => {
                let point = self.streams.entry(stream).or_default();
                assert_eq!(point.copied, self.now.copied, "a graph waits for its copies");
                assert_eq!(*self.kernels.get_or_insert(stream), stream, "the graphs are on one stream");
                assert!(self.waited + 2 > self.now.ended, "more than two graphs are under way");
                self.now.ended += 1;
                point.ended = self.now.ended;
            }
            ["event", event, "on", stream] => {
                self.events.insert(event, self.streams.get(stream).copied().unwrap_or_default());
            }
            ["wait", "of", stream, "for", "event", event] => {
                let point = self.streams.entry(stream).or_default();
                *point = point.after(self.events[event]);
            }
            ["host", "waits", "for", "event", event] => {
                let Point { ended, .. } = self.events[event];
                assert!(!steady || ended < self.now.ended, "the host waits for graph {ended}, the newest");
                self.waited = self.waited.max(ended);
            }
            ["host", "waits", ..] => assert!(!steady, "{line}: more than it needs to"),
            _ => {}
        }
    }
}
