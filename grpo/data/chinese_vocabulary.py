"""Words and phrases of generated Chinese prompts (`grpo.data.prompt_styles`)."""

from grpo.data.prompt_generator import Vocabulary

WORDS = """
欢迎 光临 营业 打烊 出口 入口 小心 安静 禁止 停车 请进 谢谢 再见 你好 注意 危险 免费 优惠 特价 新品
早餐 午餐 晚餐 咖啡 绿茶 豆浆 牛奶 果汁 面包 蛋糕 饺子 包子 馒头 米饭 炒面 火锅 烤鸭 豆腐 鸡蛋 白糖
苹果 香蕉 西瓜 葡萄 草莓 桃子 柠檬 橙子 荔枝 核桃 花生 红枣 蜂蜜 辣椒 大蒜 生姜 香菜 土豆 番茄 黄瓜
书店 药店 花店 茶馆 酒店 饭馆 银行 邮局 学校 医院 车站 机场 码头 公园 广场 市场 超市 剧院 影院 博物馆
图书馆 体育馆 游泳池 停车场 洗手间 办公室 会议室 实验室 休息区 售票处 问询处 收银台
北京 上海 广州 成都 西安 杭州 苏州 南京
春天 夏天 秋天 冬天 早晨 中午 黄昏 夜晚 星期 周末 今天 明天 昨天 元旦 春节 中秋 端午 重阳 国庆 清明
太阳 月亮 星星 云朵 雨水 雪花 春风 闪电 彩虹 大海 江河 湖泊 高山 森林 草原 沙漠 岛屿 瀑布 山谷 田野
老虎 狮子 大象 熊猫 猴子 兔子 骏马 绵羊 山羊 公鸡 小狗 小猫 海豚 鲸鱼 乌龟 青蛙 蝴蝶 蜜蜂 燕子 孔雀
红色 蓝色 黄金 白银 青铜 钢铁 玻璃 木材 丝绸 棉布 牡丹 荷花 菊花 梅花 兰花 竹林 松树 柳树 银杏 茉莉
平安 健康 快乐 幸福 吉祥 如意 成功 勇敢 自由 和平 友谊 希望 梦想 智慧 诚信 努力 创新 团结 进步 光明
音乐 舞蹈 绘画 书法 诗歌 电影 摄影 雕刻 足球 篮球 排球 网球 围棋 象棋 武术 太极 瑜伽 滑雪 登山 跑步
老师 学生 医生 护士 司机 厨师 农民 工人 画家 作家 歌手 演员 记者 律师 警察 邮差 船长 飞行员 工程师 科学家
""".split()

# name: phrase
SURFACES = {
    "neon sign": "一块霓虹灯招牌上亮着{text}",
    "wooden sign": "一块木牌上刻着{text}",
    "shop sign": "店铺的招牌上写着{text}",
    "banner": "一条红色横幅上印着{text}",
    "poster": "墙上的海报用大字写着{text}",
    "billboard": "一块巨大的广告牌上写着{text}",
    "chalkboard": "黑板上用粉笔写着{text}",
    "paper note": "一张纸条上手写着{text}",
    "book cover": "一本书的封面上印着{text}",
    "newspaper": "一份报纸的标题是{text}",
    "mug": "一只白色杯子上印着{text}",
    "cake": "蛋糕上用奶油写着{text}",
    "T-shirt": "一件白色短袖衫上印着{text}",
    "lantern": "一盏红灯笼上写着{text}",
    "scroll": "一幅卷轴上用毛笔写着{text}",
    "stone tablet": "一块石碑上刻着{text}",
    "brick wall": "砖墙上喷涂着{text}",
    "phone screen": "手机屏幕上显示着{text}",
    "departure board": "电子显示屏上滚动着{text}",
    "door": "玻璃门上贴着{text}",
    "van": "一辆面包车的车身上印着{text}",
    "road sign": "蓝色的路牌上写着{text}",
    "tea tin": "一个茶叶罐上印着{text}",
    "sand": "沙滩上写着{text}",
}
SCENES = {
    "rainy street": "下着小雨的街道上",
    "village square": "安静的村口",
    "cafe": "一家小咖啡馆里",
    "harbour": "海港边",
    "station": "火车站里",
    "stone bridge": "古老的石桥旁",
    "garden": "开满鲜花的院子里",
    "alley": "狭窄的胡同里",
    "library": "高大的书架之间",
    "bamboo forest": "一片竹子前",
    "office": "明亮的房间里",
    "country road": "乡间的小路旁",
    "night market": "热闹的夜市里",
    "kitchen": "温暖的厨房里",
    "rooftop": "城市的屋顶上",
    "subway": "地铁的站台上",
    "museum": "展览大厅里",
    "snowy town": "落满白雪的小镇上",
    "lakeside": "平静的水边",
    "classroom": "空荡荡的教室里",
}
LIGHTS = {
    "": "",
    "dawn": "清晨，",
    "noon": "正午的阳光下，",
    "dusk": "傍晚，",
    "night": "深夜，",
    "fog": "薄雾中，",
}
CAMERAS = {
    "": "",
    "static": "镜头保持不动。",
    "push in": "镜头缓缓推近。",
    "pull out": "镜头慢慢拉远。",
    "pan left": "镜头向左平移。",
    "pan right": "镜头向右平移。",
    "orbit": "镜头环绕拍摄。",
}
PARTS = Vocabulary(WORDS, SURFACES, SCENES, LIGHTS, CAMERAS)
