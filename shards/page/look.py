"""How the page of a data set looks and plays: its style sheet and its script, which are written into it."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --sheet: #ffffff; --ink: #1d2126; --quiet: #626a73; --line: #dfe1e4; --accent: #2460c8; --bar: #4f83dc;
  --chip: #eaeef5; --warn: #9a4a00; --shade: 0 1px 2px rgb(20 30 50 / 8%), 0 4px 14px rgb(20 30 50 / 5%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --sheet: #1b1e23; --ink: #e7e9ec; --quiet: #9aa3ad; --line: #31363d; --accent: #8ab4ff; --bar: #5f8fe0;
    --chip: #2a3039; --warn: #ffb36b; --shade: none;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; max-width: 1500px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .15rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
p { margin: .2rem 0; }
.quiet, .none { color: var(--quiet); }
.none { font-size: .85rem; }
code, .key, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: .7rem; margin: 1.2rem 0 1rem; }
.tiles div, .chart, .card {
  background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; box-shadow: var(--shade);
}
.tiles div { padding: .6rem .85rem; }
.tiles dt { color: var(--quiet); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; margin: 0; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; }
details summary { cursor: pointer; color: var(--accent); width: fit-content; }
pre {
  background: var(--sheet); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; white-space: pre-wrap;
  max-height: 24rem; overflow: auto; margin: .5rem 0 0;
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: .9rem; }
.wide { grid-template-columns: minmax(0, 1fr); margin-top: .9rem; }
.chart { margin: 0; padding: .8rem 1rem; }
.chart figcaption { font-weight: 600; margin-bottom: .3rem; }
.chart svg { display: block; width: 100%; height: auto; max-height: 300px; }
.chart text { fill: var(--quiet); font-size: 11px; font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart rect.bar { fill: var(--bar); }
.chart rect.bar:hover { fill: var(--accent); }
.bars { list-style: none; margin: 0; padding: 0; columns: 420px auto; column-gap: 2.2rem; }
.bars li {
  display: grid; grid-template-columns: minmax(5rem, 10rem) minmax(2rem, 1fr) 4.2rem 3.6rem; gap: .6rem; align-items: center;
  break-inside: avoid; padding: .1rem 0; font-size: .9rem; line-height: 1.3;
}
.bars .rail { height: .75rem; border-radius: 3px; background: var(--chip); overflow: hidden; }
.bars .bar { display: block; height: 100%; min-width: 2px; background: var(--bar); border-radius: 3px; }
.bars .count, .bars .share { text-align: right; font-variant-numeric: tabular-nums; }
.bars .share { color: var(--quiet); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem; }
.card { overflow: hidden; }
.card.plays { cursor: pointer; }
.card.playing { border-color: var(--accent); box-shadow: 0 0 0 2px var(--accent); }
.stage { position: relative; aspect-ratio: 16 / 9; background: #0b0c0e; }
.stage.blind { aspect-ratio: auto; min-height: 72px; }
.stage video, .stage img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.play {
  position: absolute; left: 10px; bottom: 10px; width: 46px; height: 46px; padding: 0; display: grid; place-items: center;
  border: 0; border-radius: 50%; background: rgb(255 255 255 / 92%); color: #14161a; box-shadow: 0 1px 6px rgb(0 0 0 / 40%);
  cursor: pointer;
}
.play:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.play svg { width: 22px; height: 22px; fill: currentColor; }
.play .halt, .playing .play .go { display: none; }
.playing .play .halt { display: block; }
.clock {
  position: absolute; right: 10px; bottom: 10px; padding: 0 .45rem; border-radius: 5px; background: rgb(0 0 0 / 66%); color: #fff;
  font-size: .8rem; font-variant-numeric: tabular-nums;
}
.time { position: relative; background: #0a0a1e; }
.time img { display: block; }
.strip img { width: 100%; height: auto; }
.mel { position: relative; height: 104px; }
.mel img { width: 100%; height: 100%; }
.mel i {
  position: absolute; left: 0; padding-left: 9px; font: 10px/12px system-ui, sans-serif; color: #fff; opacity: .92;
  transform: translateY(50%); text-shadow: 0 0 2px #000, 0 0 3px #000; pointer-events: none;
}
.mel i::before { content: ""; position: absolute; left: 0; top: 5.5px; width: 6px; border-top: 1px solid #fff; }
.head {
  position: absolute; top: 0; bottom: 0; left: 0; width: 2px; margin-left: -1px; background: #fff; pointer-events: none;
  box-shadow: 0 0 0 1px rgb(0 0 0 / 55%); opacity: 0;
}
.begun .head { opacity: 1; }
.said { padding: .7rem .9rem .85rem; }
.key { display: block; font-weight: 600; }
.chips { display: flex; flex-wrap: wrap; gap: .3rem; margin: .35rem 0; padding: 0; list-style: none; }
.chips li { background: var(--chip); border-radius: 99px; padding: .02rem .6rem; font-size: .82rem; }
.chips .split { background: none; border: 1px solid var(--line); color: var(--quiet); }
.numbers { color: var(--quiet); font-size: .85rem; font-variant-numeric: tabular-nums; }
.trouble { color: var(--warn); font-size: .9rem; }
.captions { margin: .35rem 0 0; padding: 0; list-style: none; font-size: .88rem; }
.captions b { font-weight: 400; color: var(--quiet); font-variant-numeric: tabular-nums; margin-right: .5rem; }
.captions + details { font-size: .88rem; }
@media (max-width: 600px) {
  .bars li { grid-template-columns: minmax(4.5rem, 8rem) minmax(1.5rem, 1fr) 3.2rem 3.2rem; gap: .4rem; }
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .facts dd { margin-bottom: .4rem; }
}
"""

SCRIPT = """
"use strict";
const cards = [...document.querySelectorAll(".card.plays")];
for (const card of cards) {
  const media = card.querySelector("video");
  const button = card.querySelector(".play");
  const clock = card.querySelector(".clock");
  const seconds = Number(card.dataset.seconds);
  const name = button.getAttribute("aria-label").replace(/^Play /, "");
  const show = () => {
    const at = Math.min(media.currentTime, seconds);
    for (const head of card.querySelectorAll(".head")) head.style.left = 100 * at / seconds + "%";
    clock.textContent = at.toFixed(1) + " / " + seconds.toFixed(1) + " s";
  };
  const follow = () => { show(); if (!media.paused) requestAnimationFrame(follow); };
  const toggle = () => {
    if (!media.paused) { media.pause(); return; }
    for (const other of cards) if (other !== card) other.querySelector("video").pause();
    media.play().catch((error) => {
      if (error.name === "AbortError") return;
      const told = card.querySelector(".unplayed") || card.querySelector(".said").appendChild(document.createElement("p"));
      told.className = "trouble unplayed";
      told.textContent = "This browser cannot play it (" + error.message + ").";
    });
  };
  media.addEventListener("play", () => {
    card.classList.add("playing", "begun");
    button.setAttribute("aria-label", "Pause " + name);
    follow();
  });
  media.addEventListener("pause", () => {
    card.classList.remove("playing");
    button.setAttribute("aria-label", "Play " + name);
    show();
  });
  media.addEventListener("seeked", show);
  card.addEventListener("click", (event) => {
    if (event.target.closest("details") || !getSelection().isCollapsed) return;
    toggle();
  });
  button.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    card.classList.add("begun");
    media.currentTime = Math.max(0, Math.min(seconds, media.currentTime + step));
  });
}
"""
