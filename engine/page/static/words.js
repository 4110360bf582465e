// The page's words in two languages, and where they are put.

const WORDS = {
  zh: {
    skip: "跳到内容", title: "胸部CT报告", standing: "仅供科研使用，不是诊断。所有文字由算法生成，须由医师核实。",
    newScan: "新的影像", model: "模型信息", theme: "明暗", dismiss: "关闭", close: "关闭",
    dropTitle: "把胸部CT拖到这里", dropFormats: "NIfTI（.nii、.nii.gz）、.mha、.nrrd、DICOM文件夹，或DICOM的zip压缩包",
    chooseFiles: "选择文件", chooseFolder: "选择文件夹", question: "自定提示问题（可不填）",
    questionHint: "不填时使用模型训练时的问题。", samples: "或打开验证表中的病例，或合成影像", phantom: "✦ 新的合成影像",
    privacy: "影像只发送到运行本程序的计算机，保存在临时文件夹，关闭后删除；不访问网络。",
    viewerTools: "阅片工具", window: "窗宽窗位", windowReading: "当前窗位与窗宽", lung: "肺窗", mediastinum: "纵隔窗", bone: "骨窗",
    dragMode: "鼠标拖动", crosshair: "定位", windowing: "调窗", pan: "平移", zoomIn: "放大", zoomOut: "缩小", reset: "复位",
    lesions: "病灶", heat: "热图", viewer: "显示", slices: "切片", facts: "影像检查与阅读层面",
    report: "报告", sentenceHint: "点击一句话：影像跳到对应层面，并显示这句话的依据。", editedHint: "已编辑：导出与复制的是编辑后的文字。", discard: "撤销编辑", edit: "编辑文字", editDone: "完成编辑",
    editText: "编辑报告文字", copy: "复制", copied: "已复制", as_txt: "文本", as_docx: "Word 文档", as_json: "报告与全部信息", as_dicom: "DICOM：结构化报告与病灶分割，归入原检查，标为未核实", reference: "参考报告（验证表）",
    findings: "征象清单", findingsHint: "勾选的征象写入报告。可取消、修改或添加，然后重新书写。",
    notEditable: "该模型训练时没有使用征象提示，清单只供查看。", addFinding: "添加征象", writeAgain: "重新书写",
    ask: "追问", askNote: "由模型按影像和上面的征象清单回答；它只学过写报告，请对照影像核实。", askHint: "例如：有胸腔积液吗？", send: "发送", configuration: "配置",
    password: "密码", enter: "进入",
    loadingModel: "正在载入模型…", ready: "就绪", failed: "模型无法载入", disconnected: "连接中断，正在重连…",
    stage_upload: "上传", stage_reading: "读取", stage_checks: "预处理与检查", stage_segmentation: "病灶分割",
    stage_vision: "视觉编码", stage_writing: "书写", queued: "排队：前面还有 {n} 项", seconds: "{s} 秒",
    confidence: "可信度 {p}", unsure: "待核实", measured: "测量", predicted: "模型判断", yours: "人工添加",
    probability: "概率", side: "侧别", zone: "肺野", size: "大小", side_left: "左", side_right: "右", side_bilateral: "双侧",
    zone_upper: "上", zone_middle: "中", zone_lower: "下", unknown: "—", remove: "删除", show: "定位到病灶",
    version: "第 {n} 版", changedLine: "与上一版相比，改变的句子已标出。", removedLine: "删去：{s}", sameLine: "与上一版相同。",
    axial: "轴位", coronal: "冠状位", sagittal: "矢状位", slice: "层面 {n}/{all}", position: "层 {z} · 行 {y} · 列 {x}{hu}",
    mapping: "正在计算依据…", mapped: "热图：这句话的依据（模型特征，粗略）",
    tooLarge: "文件共 {mb} MB，本页最多接收 {most} MB：请裁剪到胸部，或以 --max_upload_mb 启动。",
    emptyFolder: "没有可发送的文件。", lost: "连接中断：请确认程序仍在运行，然后重试。",
    confirm_force: "仍然阅读（报告会注明）", confirm_accept_toy: "我知道这是演示模型，仍然阅读", cut: "报告达到长度上限被截断。",
    rewritten: "最初写出的文字与征象不一致，这是再写几份中最接近的一份。",
    about_checkpoint: "检查点", about_trained: "训练", about_language_model: "语言模型", about_device: "设备",
    about_scan_backend: "扫描后端", about_versions: "版本", about_verdict: "评价结论", about_calibration: "可信度",
    noVerdict: "未提供报告评价（--card）", calibrated: "已校准", uncalibrated: "未校准：词语概率", about_findings_prompt: "征象提示",
    demo: "演示模型：只在合成影像上训练，不能用于真实患者。", gone: "这份影像已不再保留，请重新载入。",
    webgl: "NiiVue在这里显示不了这份影像（未安装、浏览器没有WebGL2或影像太大），显示服务器的切片。",
  },
  en: {
    skip: "Skip to content", title: "Chest CT report", standing: "For research use, not a diagnosis. All text is written by an algorithm and must be verified by a physician.",
    newScan: "New scan", model: "Model", theme: "Light or dark", dismiss: "Close", close: "Close",
    dropTitle: "Drop a chest CT here", dropFormats: "NIfTI (.nii, .nii.gz), .mha, .nrrd, a DICOM folder, or a zip of one",
    chooseFiles: "Choose files", chooseFolder: "Choose a folder", question: "A question of your own (optional)",
    questionHint: "Empty: the question that the model was trained with.", samples: "Or open a case of the validation table, or a synthetic scan", phantom: "✦ A new synthetic scan",
    privacy: "The scan goes to the computer that runs this program, into a temporary folder that is removed at the end. Nothing is sent to the network.",
    viewerTools: "Viewer", window: "Window", windowReading: "Level and width", lung: "Lung", mediastinum: "Mediastinum", bone: "Bone",
    dragMode: "Dragging", crosshair: "Crosshair", windowing: "Window", pan: "Pan", zoomIn: "Zoom in", zoomOut: "Zoom out", reset: "Reset",
    lesions: "Lesions", heat: "Heat map", viewer: "Viewer", slices: "Slices", facts: "Checks of the scan, slices read",
    report: "Report", sentenceHint: "Click a sentence: the viewer goes to its slice and shows what speaks for it.", editedHint: "Edited: copies and files hold the edited text.", discard: "Discard the edits", edit: "Edit text", editDone: "Done",
    editText: "Text of the report", copy: "Copy", copied: "Copied", as_txt: "Text", as_docx: "Word", as_json: "The report with all that is known of it", as_dicom: "DICOM: structured reports and segmentation in the scan's study, marked unverified", reference: "Reference report (validation table)",
    findings: "Findings", findingsHint: "What is ticked goes into the report. Untick, change or add, then write again.",
    notEditable: "This model was trained without findings prompts: the list is for reading.", addFinding: "Add a finding", writeAgain: "Write again",
    ask: "Ask", askNote: "Answered from the scan and the findings above by a model that learnt to write reports: check it against the scan.", askHint: "For example: is there a pleural effusion?", send: "Send", configuration: "Configuration",
    password: "Password", enter: "Enter",
    loadingModel: "Loading the model…", ready: "Ready", failed: "The model cannot be loaded", disconnected: "Connection lost, trying again…",
    stage_upload: "Upload", stage_reading: "Reading", stage_checks: "Preprocessing and checks", stage_segmentation: "Segmentation",
    stage_vision: "Vision", stage_writing: "Writing", queued: "Waiting: {n} before this one", seconds: "{s} s",
    confidence: "confidence {p}", unsure: "to be verified", measured: "measured", predicted: "model", yours: "added",
    probability: "probability", side: "Side", zone: "Zone", size: "Size", side_left: "left", side_right: "right", side_bilateral: "both",
    zone_upper: "upper", zone_middle: "middle", zone_lower: "lower", unknown: "—", remove: "Remove", show: "Show the lesion",
    version: "Version {n}", changedLine: "Sentences that differ from the version before are marked.", removedLine: "Removed: {s}", sameLine: "As the version before.",
    axial: "Axial", coronal: "Coronal", sagittal: "Sagittal", slice: "slice {n}/{all}", position: "slice {z} · row {y} · column {x}{hu}",
    mapping: "Computing the evidence…", mapped: "Heat map: evidence for this sentence (of the model's features, coarse)",
    tooLarge: "The files have {mb} MB, this page takes up to {most} MB: crop the scan to the chest, or start with --max_upload_mb.",
    emptyFolder: "No file to send.", lost: "Connection lost: see that the program still runs, then try again.",
    confirm_force: "Read it all the same (the report will say so)", confirm_accept_toy: "I know that this is a demonstration model: read it", cut: "The report was cut at its longest length.",
    rewritten: "The first text did not state these findings; this is the closest of several more.",
    about_checkpoint: "Checkpoint", about_trained: "Training", about_language_model: "Language model", about_device: "Device",
    about_scan_backend: "Scan backend", about_versions: "Versions", about_verdict: "Report card", about_calibration: "Confidence",
    noVerdict: "no report card was given (--card)", calibrated: "calibrated", uncalibrated: "not calibrated: probability of the words", about_findings_prompt: "Findings prompt",
    demo: "A demonstration model: trained on synthetic scans alone, useless for patients.", gone: "This scan is no longer kept: load it again.",
    webgl: "NiiVue cannot show this scan here (not installed, no WebGL2, or too large): the server's slices are shown.",
  },
};

let language = "zh";

export function chosenLanguage() {
  const kept = localStorage.getItem("language");
  return kept in WORDS ? kept : navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export function setLanguage(name) {
  language = name;
  localStorage.setItem("language", name);
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
}

export const currentLanguage = () => language;

export function t(key, values = {}) {
  const text = WORDS[language][key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export function translate(root) {
  for (const one of root.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
  for (const one of root.querySelectorAll("[data-label]")) {
    one.setAttribute("aria-label", t(one.dataset.label));
    if (one.matches("button, span")) one.title = t(one.dataset.label);
  }
  for (const one of root.querySelectorAll("[data-placeholder]")) one.placeholder = t(one.dataset.placeholder);
  document.title = t("title");
}
