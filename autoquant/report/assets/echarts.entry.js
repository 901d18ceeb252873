import * as core from 'echarts/core';
import {BarChart, HeatmapChart, LineChart, GraphChart, ScatterChart} from 'echarts/charts';
import {GridComponent, TooltipComponent, VisualMapContinuousComponent, LegendComponent, AriaComponent, DataZoomInsideComponent, MarkLineComponent} from 'echarts/components';
import {CanvasRenderer, SVGRenderer} from 'echarts/renderers';
core.use([BarChart, HeatmapChart, LineChart, GraphChart, ScatterChart, GridComponent, TooltipComponent, VisualMapContinuousComponent, LegendComponent, AriaComponent, DataZoomInsideComponent, MarkLineComponent, CanvasRenderer, SVGRenderer]);
globalThis.echarts = core;
